"""The command `nanovllm-jax` and its subcommands.

Nothing here imports JAX or transformers until a command needs them, so that `--help` answers at once.
"""

from nanovllm_jax.cli.root import app


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="nanovllm-jax")
