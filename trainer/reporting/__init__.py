"""What a job found out, from figures and comparisons to the report as JSON and as a page."""
