"""How a base lies in memory: layouts, fewer bits, shares of several devices, number formats."""
