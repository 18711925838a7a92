"""Dense transformers: one pure function, and what differs between families."""
