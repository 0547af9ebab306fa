"""`trajlm inspect`: a stay edited by hand, and the belief that moves."""
