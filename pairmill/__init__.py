"""The front door: the command line, the whole pipeline, the quickstart and the report."""
