"""The ways to transfer: each takes data and gives a backbone file and a head."""
