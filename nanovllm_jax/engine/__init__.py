"""Host shell: requests, block manager and scheduler in plain Python, and the loop that drives the device.

`request`, `block_manager` and `scheduler` decide over small data and never import JAX.
"""
