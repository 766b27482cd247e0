/** Moved to client/pixels.js; this path is kept for pages that already import it. */

export * from "./client/pixels.js";
