"""The ladder of fixed rows, and the report card of one target."""
