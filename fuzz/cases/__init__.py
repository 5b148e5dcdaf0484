"""Cases: descriptions of inputs, the families they name, and the tensors they stand for."""
