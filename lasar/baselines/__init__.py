"""Methods that any recommender must beat, tuned on validation as carefully as the model is.

Every baseline has `fit(sequences, num_items)` on training events only and `recommend(histories, baskets, k)`.
"""
