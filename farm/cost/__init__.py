"""What a farm will cost and what it did cost: prices, measured unit times, prediction, and what became of it."""
