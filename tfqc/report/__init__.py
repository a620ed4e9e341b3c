"""What people look at: image grids, plots, tables, and the numbers behind them."""
