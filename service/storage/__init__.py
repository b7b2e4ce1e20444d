"""Storage: what outlives the process. One SQLite file, and folders of files named by digest."""
