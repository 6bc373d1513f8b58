// Unpacks what the page holds, and shows it.

async function begin() {
  const began = performance.now();
  try {
    const header = JSON.parse(element("header").textContent);
    const attention = new Attention(header, await inflated(bytesOf(element("rows").textContent)));
    element("rows").remove();
    const load = async (picture) => {
      const image = made("img", { src: picture.png });
      await image.decode();
      return image;
    };
    const images = await Promise.all(header.groups.map((group) => Promise.all(group.pictures.map(load))));
    element("content").hidden = false;
    window.explorer = { page: new Page(header, attention, images), pure, milliseconds: performance.now() - began };
  } catch (error) {
    element("failure").textContent = `This page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`;
    element("failure").hidden = false;
    throw error;
  }
}

begin();
