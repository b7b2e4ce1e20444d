"""Reads datasets: whatever comes in, by one reader, with one account of what became of it.

A client's folder and an archive, pairs and images in a request, a folder of the server:
all become a list of entries, `layout` finds the classes among their names, and `reader`
checks the images. It runs in a process of its own, `python -m service.ingest`, since what
is decoded comes from strangers. Knows no database.
"""
