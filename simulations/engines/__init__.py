"""What runs the two apps of a simulation on this machine: the local engine (`local`), or Flower's own over Ray (`ray`).

Both give the same scores, weights and final arrays, to the bit.
"""
