"""What tells good dictionaries from bad ones, with the true features at hand or without them."""
