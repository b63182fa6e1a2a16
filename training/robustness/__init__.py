"""How a network fares on images unlike those it learnt from: damaged, moved, thinner, or no digit at all."""
