"""The description of one input, the families it is drawn from, and the tensors it stands for."""
