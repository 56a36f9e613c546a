"""The engines: each turns a framework's own training engine into one that takes local steps."""
