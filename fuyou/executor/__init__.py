"""Carries out a plan: weights in, blocks computed, gradients out."""
