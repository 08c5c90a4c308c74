"""Trainers: stateless workers that carry runs of sparse autoencoders on, and what is done with them."""
