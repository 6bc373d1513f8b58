"""How much may be spent where a chapter runs the model many times."""

from __future__ import annotations

from dataclasses import dataclass

MIN_IMAGES = 30  # with fewer, intervals say nothing
# The default model costs 1.4e7 an image and pass; two cores do about 5e10 of them in a second. It is not measured on
# the machine, so that the same images are taken everywhere.
TWO_MINUTES = 6e12


@dataclass(frozen=True)
class Budget:
    images: int | None  # of a stratified subset; None for all
    controls: int  # models with random weights
    max_cost: float | None = None  # of a chapter, in passes x images x parameters x tokens; None for no bound

    def affordable_images(self, cost_of_image: float, num_images: int, of_all: bool = False) -> int | None:
        """Return how many of `num_images` a chapter can afford at so much each; None where that is too few.

        of_all: a chapter that counts errors, which are few, takes as many of all images as two minutes allow.
        """
        if self.max_cost is None:  # as many as were asked for
            return num_images if self.images is None else self.images
        wanted, max_cost = self.images, self.max_cost
        if of_all:
            wanted, max_cost = None, max(max_cost, TWO_MINUTES)
        count = min(num_images if wanted is None else wanted, int(max_cost / cost_of_image))
        return None if count < MIN_IMAGES else count


QUICK, FULL = Budget(500, 3, 1e12), Budget(2000, 10, 1e13)
