"""The jitted side: pure functions over one donated device state."""
