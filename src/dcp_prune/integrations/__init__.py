"""Where a pruner meets a model inside an engine: one module per engine, nothing imported until asked for."""
