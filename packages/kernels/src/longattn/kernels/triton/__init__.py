"""The Triton family: one forward, two backward passes and a merge over lists of tiles that come from the plan.

`row` is light and declares what the row can do; nothing here imports triton before the row is chosen. `row_classes` and `joblist` turn a
plan into tables, `configurations` holds the tile sizes, the `*_kernel` modules hold the kernels, and `launch*` calls them. `nox -s ahead`
in the checkout compiles every shipped configuration without a GPU.
"""
