"""`python -m megatron_gspo` is the `megatron-gspo` program."""

from megatron_gspo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
