"""The main job on a real text: `python -m demo` from the root of the checkout."""
