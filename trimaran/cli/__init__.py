"""The `trimaran` command: one module per noun. Parsing and printing; the work is done elsewhere."""
