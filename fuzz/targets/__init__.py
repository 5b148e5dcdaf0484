"""What can be judged: the built-in targets, fla's kernels, and functions of users."""
