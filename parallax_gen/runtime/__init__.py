"""From tensors to a launch: the kernel that is known to be best, called with as little ado as Python allows."""
