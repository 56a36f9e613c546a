"""A framework's engine that takes local steps."""
