"""Jobs: what is kept of them, who runs them, and the contract with the trainer."""
