"""What a person sees of a run: console, event log, tables, figures. Nothing is imported until it is used."""
