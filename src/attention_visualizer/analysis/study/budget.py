"""How much may be spent where a chapter runs the model many times."""

from __future__ import annotations

from dataclasses import dataclass

MIN_IMAGES = 30  # with fewer, intervals say nothing


@dataclass(frozen=True)
class Budget:
    images: int | None  # of a stratified subset; None for all
    controls: int  # models with random weights
    max_cost: float | None = None  # of a chapter, in passes x images x parameters x tokens; None for no bound

    def affordable_images(self, cost_of_image: float, num_images: int) -> int | None:
        """Return how many of `num_images` a chapter can afford at so much each; None where that is too few."""
        count = num_images if self.images is None else self.images
        if self.max_cost is None:
            return count
        count = min(count, int(self.max_cost / cost_of_image))
        return None if count < MIN_IMAGES else count


# The default model costs 1.4e7 an image and pass; two cores do about 5e10 of them in a second.
QUICK, FULL = Budget(500, 3, 1e12), Budget(2000, 10, 1e13)
