"""Tables that are rebuilt from result files, so that no number in a document is typed by hand."""
