"""What `make gpu` does on a machine with a GPU and no network: build, test, measure, distil, and keep what came out.

`machine` looks whether there is a GPU, `place` makes an environment of its own, `steps` says what is done, `runner` and
`processes` do it within the time, `report` keeps the results, `carry` is the part for the machine with a network.
"""
