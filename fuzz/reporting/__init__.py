"""Reports: the terminal, the plots and the HTML page."""
