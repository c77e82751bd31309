"""What other projects read and write: names, files, weights with an adapter folded into them."""
