"""Whether a judge reads the rules, measured on what it said."""
