"""The command line: one `equipot`, whose verbs load only what they need."""
