"""Generated from proto/graft/v1; never edited."""
