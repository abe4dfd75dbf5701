// Pictures with their settings, kept in this browser (IndexedDB), newest first.

const MOST = 500;

const promise = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

let database;
function open() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("nitro", 1);
    request.onupgradeneeded = () =>
      request.result.createObjectStore("pictures", { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return database;
}

const store = async (mode) => (await open()).transaction("pictures", mode).objectStore("pictures");

export async function all() {
  return (await promise((await store("readonly")).getAll())).reverse();
}

// Keeps a picture `{ blob, settings }`; returns it with its id. The oldest make room.
export async function add(picture) {
  const id = await promise((await store("readwrite")).add(picture));
  const keys = await promise((await store("readonly")).getAllKeys());
  for (const old of keys.slice(0, Math.max(0, keys.length - MOST))) await remove(old);
  return { ...picture, id };
}

export async function remove(id) {
  await promise((await store("readwrite")).delete(id));
}
