"""What people read of a federation: lines while it runs, tables, plots, and a page for all who took part."""
