"""The command line: one short file per verb, everything heavy imported inside the function."""
