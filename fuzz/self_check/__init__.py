"""How well the judge finds planted defects, and how often it is wrong."""
