/** Moved to client/pictures.js; this path is kept for pages that already import it. */

export * from "./client/pictures.js";
