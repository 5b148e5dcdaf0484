"""What a person reads: the terminal, the plots and the HTML report."""
