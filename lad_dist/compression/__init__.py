"""Compressions: model to smaller model, the modules that stand in a student while it trains, the compact export."""
