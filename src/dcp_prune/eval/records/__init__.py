"""Records of a sweep, a folder that only grows: `read_records` reads it, a `RecordsFolder` is being written."""

from dcp_prune.errors import DcpPruneError

try:
    from dcp_prune.eval.records.folder import Records, RecordsFolder, read_records
    from dcp_prune.eval.records.rows import SCHEMA, to_part
except ModuleNotFoundError as missing:
    raise DcpPruneError(
        f"records of a sweep need {missing.name}, which is not installed; run: pip install 'dcp-prune[eval]'"
    ) from missing

__all__ = ["SCHEMA", "Records", "RecordsFolder", "read_records", "to_part"]
