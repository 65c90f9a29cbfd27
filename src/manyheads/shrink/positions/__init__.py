"""How heads encode positions: methods that replace rotary angles, or re-number them."""
