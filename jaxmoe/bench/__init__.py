"""What `python -m jaxmoe bench` measures with; not part of the library's public surface.

`loads` makes routings, `floors` says how fast they can be served, `clocks` and `events` time,
`baselines` are other ways to the same result, `exchange` runs them all and `report` prints.
"""
