"""`penstock plan`: what a config will take."""
